"""Our own layouts: codes of any width, bit after bit along a row."""

import numpy as np

from .base import Layout, Packed, Unpacked, chunks


class BinaryRows(Layout):
    """One bit a weight: bit j (lowest first) of byte b of a row is set where the code of column 8b+j is +1."""

    name = "binary_rows"

    def pack(self, matrix: Unpacked) -> Packed:
        if matrix.codes.shape[1] % 8:
            raise ValueError(f"{self.name} packs eight columns in a byte, but a row has {matrix.codes.shape[1]}")
        self._require_codes(matrix.codes, (-1, 1))
        bits = np.packbits(matrix.codes > 0, axis=1, bitorder="little")
        return Packed({"weight": bits, "weight_scale": self._one_scale(matrix)})

    def unpack(self, packed: Packed, shape: tuple[int, int]) -> Unpacked:
        byte = self._array(packed, "weight", (shape[0], -(-shape[1] // 8)))
        if shape[1] % 8:
            raise ValueError(f"{self.name} packs eight columns in each of its bytes, so {shape[1]} columns cannot be")
        bits = np.unpackbits(byte, axis=1, bitorder="little").astype(np.int16)
        return Unpacked(2 * bits - 1, self._stored_scale(packed))


def stored_scale(scale: np.ndarray) -> np.ndarray:
    """Scales of groups as float16, which ours are, where it holds them exactly; others as float32."""
    with np.errstate(over="ignore"):
        half = scale.astype(np.float16)
    exact = scale.shape[1] > 1 and np.array_equal(half.astype(np.float32), scale)
    return half if exact else scale.astype(np.float32)


class Dense(Layout):
    """Codes minus ``lo``, lowest bit first along each row, rows padded to bytes; the header array says bits and lo.

    Scales are float16 where a matrix has groups that they hold exactly (the formats round them so), else float32.
    """

    name = "dense"

    def pack(self, matrix: Unpacked) -> Packed:
        low, high = int(matrix.codes.min()), int(matrix.codes.max())
        # Two's complement ranges keep their natural width: -8..7 is four bits even where no code is -8.
        lo = 0 if low >= 0 else -(1 << max(int(max(-low - 1, high)).bit_length(), 0))
        bits = max(int(max(high - lo, -2 * lo - 1 if lo else 1)).bit_length(), 1)
        if bits > 8:
            raise ValueError(f"dense holds codes of at most 8 bits, but the matrix has codes from {low} to {high}")
        code_bits = np.unpackbits((matrix.codes - lo).astype(np.uint8)[..., None], axis=-1, bitorder="little")
        packed = np.packbits(code_bits[..., :bits].reshape(matrix.codes.shape[0], -1), axis=1, bitorder="little")
        scale = stored_scale(matrix.scale)
        arrays = {
            "weight": packed,
            "weight_scale": scale,
            "weight_code": np.array([bits, lo], np.int16),
        }
        if matrix.offset is not None:
            zero = np.rint(-matrix.offset / np.where(matrix.scale == 0, 1, matrix.scale))
            if zero.min() < 0 or zero.max() > 255 or not np.array_equal(-matrix.scale * zero, matrix.offset):
                raise ValueError(
                    "dense holds offsets as an integer zero point of 0 to 255 times the scale, unlike these"
                )
            arrays["weight_zero"] = zero.astype(np.uint8)
        return Packed(arrays)

    def unpack(self, packed: Packed, shape: tuple[int, int]) -> Unpacked:
        bits, lo = (int(v) for v in self._array(packed, "weight_code", (2,)))
        if not (1 <= bits <= 8 and -(1 << bits - 1) <= lo <= 0):
            raise ValueError(f"dense holds 1 to 8 bits a code, but its weight_code says {bits} bits from {lo}")
        byte = self._array(packed, "weight", (shape[0], -(-shape[1] * bits // 8)))
        codes = _codes(byte, bits, shape[1]).astype(np.int16)
        codes += np.int16(lo)
        scale = self._array(packed, "weight_scale", (-1, -1)).astype(np.float32)
        if scale.shape[0] not in (1, shape[0]) or not scale.shape[1] or shape[1] % scale.shape[1]:
            raise ValueError(f"dense has weight_scale of {scale.shape} values, which do not share out a {shape} matrix")
        zero = None if "weight_zero" not in packed.arrays else self._array(packed, "weight_zero", scale.shape)
        return Unpacked(codes, scale, None if zero is None else -scale * zero.astype(np.float32))

    def dequantize(self, packed: Packed, shape: tuple[int, int]) -> np.ndarray:
        """The values, float32 [out, in], some rows at a time, so that what is made on the way stays in the cache."""
        if "weight" not in packed.arrays or len(packed.arrays["weight"]) != shape[0]:
            return super().dequantize(packed, shape)  # which says what is wrong
        values = np.empty(shape, np.float32)
        for some in chunks(shape):
            part = self.rows(packed, shape, some)
            assert part is not None
            values[some] = super().dequantize(part, (len(values[some]), shape[1]))
        return values


def _codes(byte: np.ndarray, bits: int, columns: int) -> np.ndarray:
    """Fields of so many bits, lowest first, of uint8 rows [n, bytes]: uint8 [n, columns]."""
    if bits == 8:
        return byte
    runs = -(-columns // 8)  # eight codes are ``bits`` bytes, which fit an integer of 64 bits
    wide = np.zeros((len(byte), runs, 8), np.uint8)
    padded = byte
    if byte.shape[1] != runs * bits:
        padded = np.zeros((len(byte), runs * bits), np.uint8)
        padded[:, : byte.shape[1]] = byte
    wide[..., :bits] = padded.reshape(len(byte), runs, bits)
    words = wide.view("<u8")
    codes = np.empty((len(byte), runs, 8), np.uint8)
    for i in range(8):
        codes[..., i] = (words[..., 0] >> np.uint64(bits * i)) & np.uint64((1 << bits) - 1)
    return codes.reshape(len(byte), -1)[:, :columns]
