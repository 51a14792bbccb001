"""How far the C library's heap grows where blocks are taken and given back in a known order, and none is written to.

    python heap.py 0 < [[[key, bytes], ...], [[key, bytes], ...]]

A program by itself, because the heap has to be empty at the start. The first list is what is there before the library
is told to keep what is freed, as fused.py's `keep_freed_memory` does, and the second what comes after; negative bytes
give a block back. What fits into no hole makes the heap grow, and holes stay: glibc before 2.38 seldom puts an aligned
block where one of its own size was, because it wants room for the alignment too, and small blocks keep holes apart.
"""

import ctypes
import json
import sys

# What PyTorch allocates beside the numbers of each tensor: its storage, itself, and how it was made. They lie between
# the large blocks, and a little more or less of them makes other holes: several are tried.
RECORDS = ((40, 100, 200), (24, 104, 192), (32, 96, 208, 136), (104, 200), (24, 104, 200, 144, 300))


def grown(before: list[tuple[int, int]], after: list[tuple[int, int]], records: tuple[int, ...]) -> int:
    """Bytes that the heap has at the end, and those of `before`, which lie outside it."""
    libc = ctypes.CDLL(None)
    libc.sbrk.restype, libc.sbrk.argtypes = ctypes.c_void_p, [ctypes.c_ssize_t]
    libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
    libc.free.argtypes = [ctypes.c_void_p]
    libc.posix_memalign.argtypes = [ctypes.POINTER(ctypes.c_void_p), ctypes.c_size_t, ctypes.c_size_t]
    outside = sum(n for _, n in before)
    libc.mallopt(-4, 0)  # M_MMAP_MAX
    libc.mallopt(-1, (1 << 31) - 1)  # M_TRIM_THRESHOLD
    start, held = libc.sbrk(0), {}
    for key, n in after:
        if n >= 0:
            block = ctypes.c_void_p()
            if libc.posix_memalign(ctypes.byref(block), 64, max(1, n)):
                raise MemoryError
            held[key] = [*map(libc.malloc, records), block.value]
        else:
            for pointer in held.pop(key, ()):  # what was there before stays
                libc.free(pointer)
    return outside + libc.sbrk(0) - start


if __name__ == "__main__":
    first, then = json.load(sys.stdin)
    print(grown(first, then, RECORDS[int(sys.argv[1])]))
