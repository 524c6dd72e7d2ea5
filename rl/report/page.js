// Shows the values under the pointer or the finger, in every chart that has the same axis. Without scripts the curves are all there.
const charts = [...document.querySelectorAll("svg[data-hover]")].map((svg) => ({
  svg, axis: svg.dataset.axis, cursor: svg.querySelector(".cursor"), out: svg.nextElementSibling, ...JSON.parse(svg.dataset.hover),
}));
const nearest = (values, wanted) =>
  values.reduce((best, v, i) => (Math.abs(v - wanted) < Math.abs(values[best] - wanted) ? i : best), 0);
const show = (chart, i) => {
  chart.cursor.setAttribute("x1", chart.at[i]);
  chart.cursor.setAttribute("x2", chart.at[i]);
  chart.cursor.classList.add("on");
  const values = chart.lines.filter(([, text]) => text[i] !== "").map(([name, text]) => `${name}: ${text[i]}`);
  chart.out.textContent = [`${chart.axis} ${chart.text[i]}`, ...values].join(" · ");
};
for (const chart of charts) {
  const move = (event) => {
    const box = chart.svg.getBoundingClientRect();
    const x = chart.x[nearest(chart.at, ((event.clientX - box.left) / box.width) * chart.svg.viewBox.baseVal.width)];
    for (const other of charts) if (other.axis === chart.axis) show(other, nearest(other.x, x));
  };
  chart.svg.addEventListener("pointermove", move);
  chart.svg.addEventListener("pointerdown", move);
}
