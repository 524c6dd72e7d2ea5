"""Is a cable between two network taps that delays, loses and slows what it carries, for kernels without netem.

`python cable.py TAP TAP FILE`: FILE says how, as "delay in ms, loss in %, rate in Mbit/s (0: any)", and may change at any time.
"""

import contextlib
import fcntl
import heapq
import os
import random
import select
import struct
import sys
import time
from pathlib import Path

TUNSETIFF, TAP_WITHOUT_HEADER = 0x400454CA, 0x1002  # linux/if_tun.h
MOST = 20_000  # frames under way


def tap(name: str) -> int:
    handle = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
    fcntl.ioctl(handle, TUNSETIFF, struct.pack("16sH22x", name.encode(), TAP_WITHOUT_HEADER))
    return handle


def main(one: str, other: str, file: Path) -> None:
    ends = [tap(one), tap(other)]
    under_way: list[tuple[float, int, int, bytes]] = []
    count, free, read = 0, [0.0, 0.0], 0.0
    delay = loss = rate = 0.0
    while True:
        now = time.monotonic()
        if now - read > 0.2:
            read = now
            delay, loss, rate = map(float, (file.read_text() or "0 0 0").split())
        pause = max(0.0, min(0.2, under_way[0][0] - now)) if under_way else 0.2
        for end in select.select(ends, [], [], pause)[0]:
            to = 1 - ends.index(end)
            for frame in frames(end):
                if random.random() * 100 < loss or len(under_way) >= MOST:
                    continue
                free[to] = max(free[to], time.monotonic()) + (len(frame) * 8e-6 / rate if rate else 0)
                count += 1
                heapq.heappush(under_way, (free[to] + delay / 1e3, count, ends[to], frame))
        while under_way and under_way[0][0] <= time.monotonic():
            _, _, end, frame = heapq.heappop(under_way)
            with contextlib.suppress(OSError):  # the other end is down
                os.write(end, frame)


def frames(end: int) -> list[bytes]:
    found: list[bytes] = []
    try:
        while len(found) < 64:
            found.append(os.read(end, 70_000))
    except BlockingIOError:
        pass
    return found


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], Path(sys.argv[3]))
