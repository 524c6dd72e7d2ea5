"""What a kernel that is launched early may do before it waits, as its code shows it."""

import pytest

from kernels.gpu.ahead import hasty

WAIT = "griddepcontrol.wait; griddepcontrol.launch_dependents;"


@pytest.mark.parametrize(
    ("lines", "named"),
    [
        ([WAIT, "ld.global.b32 %r1, [%rd1];"], ""),
        (["cp.async.bulk.prefetch.L2.global [%rd1], %r2;", "ld.param.b64 %rd1, [p];", WAIT], ""),
        (["ld.global.b32 %r1, [%rd1];"], "does not wait"),
        (["@%p1 ld.global.v4.b32 {%r1}, [%rd1];", WAIT], "ld.global.v4.b32 stands before"),
        (["st.global.b32 [%rd1], %r1;", WAIT], "st.global.b32 stands before"),
        (["atom.global.add.u32 %r1, [%rd1], 1;", WAIT], "atom.global.add.u32 stands before"),
        (["cp.async.cg.shared.global [%r1], [%rd1], 16;", WAIT], "cp.async.cg.shared.global stands before"),
        (["cp.async.bulk.tensor.2d.shared [%r1], [%rd1];", WAIT], "cp.async.bulk.tensor.2d.shared stands before"),
        (["setmaxnreg.inc.sync.aligned.u32 240;", "ld.global.b32 %r1, [%rd1];", WAIT], ""),
        (["setmaxnreg.inc.sync.aligned.u32 240;", "ld.global.b32 %r1, [%rd1];"], "does not wait"),
    ],
)
def test_a_kernel_waits_before_it_touches_memory(lines: list[str], named: str) -> None:
    found = hasty("\n\t".join([".visible .entry kernel(", *lines, "ret;"]))
    assert named in found if named else found == ""
