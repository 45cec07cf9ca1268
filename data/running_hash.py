"""A sha256 that can be put aside and taken up again, also by another process; hashlib's cannot."""

from __future__ import annotations

import struct

import numpy as np

from data.jit import compiled

BLOCK = 64
# FIPS 180-4: the constants are fractions of the cube roots of the first 64 primes (section 4.2.2), the start
# those of the square roots of the first 8 (section 5.3.3).
PRIMES = [number for number in range(2, 312) if all(number % divisor for divisor in range(2, number))]


def _root_fraction(prime: int, power: int) -> int:
    """The first 32 bits of the fraction of a prime's root, in whole numbers alone."""
    scaled = prime << (32 * power)
    low, high = 0, 1 << 40
    while high - low > 1:
        middle = (low + high) // 2
        if middle**power <= scaled:
            low = middle
        else:
            high = middle
    return low & 0xFFFFFFFF


ROUNDS = np.array([_root_fraction(prime, 3) for prime in PRIMES], dtype=np.uint32)
START = np.array([_root_fraction(prime, 2) for prime in PRIMES[:8]], dtype=np.uint32)


def _compress(state, words, rounds):
    """Take whole blocks (words: (N, 16) uint32) into `state` (8 uint32), in place."""
    schedule = np.empty(64, np.uint32)
    for block in range(words.shape[0]):
        for i in range(16):
            schedule[i] = words[block, i]
        for i in range(16, 64):
            early, late = schedule[i - 15], schedule[i - 2]
            s0 = ((early >> 7) | (early << 25)) ^ ((early >> 18) | (early << 14)) ^ (early >> 3)
            s1 = ((late >> 17) | (late << 15)) ^ ((late >> 19) | (late << 13)) ^ (late >> 10)
            schedule[i] = np.uint32(schedule[i - 16] + s0 + schedule[i - 7] + s1)
        a, b, c, d = state[0], state[1], state[2], state[3]
        e, f, g, h = state[4], state[5], state[6], state[7]
        for i in range(64):
            s1 = ((e >> 6) | (e << 26)) ^ ((e >> 11) | (e << 21)) ^ ((e >> 25) | (e << 7))
            first = np.uint32(h + s1 + ((e & f) ^ (~e & g)) + rounds[i] + schedule[i])
            s0 = ((a >> 2) | (a << 30)) ^ ((a >> 13) | (a << 19)) ^ ((a >> 22) | (a << 10))
            second = np.uint32(s0 + ((a & b) ^ (a & c) ^ (b & c)))
            h, g, f, e = g, f, e, np.uint32(d + first)
            d, c, b, a = c, b, a, np.uint32(first + second)
        state[0] += a
        state[1] += b
        state[2] += c
        state[3] += d
        state[4] += e
        state[5] += f
        state[6] += g
        state[7] += h


class RunningSha256:
    """The sha256 (FIPS 180-4) of bytes that come in parts; with `state` another process goes on."""

    def __init__(self, state: dict | None = None):
        state = state or {"words": START.tolist(), "rest": "", "length": 0}
        self._words = np.array(state["words"], dtype=np.uint32)
        self._rest, self._length = bytes.fromhex(state["rest"]), state["length"]

    def update(self, data: bytes) -> None:
        """Take `data` in."""
        self._length += len(data)
        data = self._rest + data
        whole = len(data) - len(data) % BLOCK
        self._take(data[:whole])
        self._rest = data[whole:]

    def _take(self, blocks: bytes) -> None:
        words = np.frombuffer(blocks, dtype=">u4").astype(np.uint32).reshape(-1, 16)
        compiled(_compress)(self._words, words, ROUNDS)

    def state(self) -> dict:
        """What has been taken in, as JSON values."""
        return {"words": self._words.tolist(), "rest": self._rest.hex(), "length": self._length}

    def hexdigest(self) -> str:
        """The digest so far; more may be taken in afterwards."""
        zeros = -(len(self._rest) + 9) % BLOCK
        last = RunningSha256(self.state())
        last._take(self._rest + b"\x80" + bytes(zeros) + struct.pack(">Q", 8 * self._length))
        return "".join(f"{word:08x}" for word in last._words.tolist())
