"""Width and height of a picture from its header alone, so that a decompression bomb is never decoded."""

import struct

KINDS = "JPEG, PNG, WebP, GIF, BMP, TIFF"  # that `header_size` knows


def header_size(content: bytes) -> tuple[int, int] | None:
    """(width, height) that the header of a PNG, JPEG, GIF, BMP, WebP or TIFF file claims; None for anything else."""
    try:
        if content[:8] == b"\x89PNG\r\n\x1a\n":
            return struct.unpack(">II", content[16:24])
        if content[:2] == b"\xff\xd8":
            return _jpeg(content)
        if content[:6] in (b"GIF87a", b"GIF89a"):
            return struct.unpack("<HH", content[6:10])
        if content[:2] == b"BM":
            return _bmp(content)
        if content[:4] == b"RIFF" and content[8:12] == b"WEBP":
            return _webp(content)
        if content[:4] in (b"II*\0", b"MM\0*"):
            return _tiff(content)
    except (struct.error, IndexError):
        return None  # the header is cut off: the decoder will say so
    return None


def _jpeg(content: bytes) -> tuple[int, int] | None:
    """From the first start-of-frame segment (markers C0 to CF, but not the tables C4 and CC and the reserved C8)."""
    position = 2
    while position + 9 <= len(content):
        if content[position] != 0xFF:
            return None
        marker = content[position + 1]
        if marker == 0xFF:  # padding before a marker
            position += 1
            continue
        if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):
            height, width = struct.unpack(">HH", content[position + 5 : position + 9])
            return width, height
        if marker in (0x01, *range(0xD0, 0xD9)):  # markers without a segment
            position += 2
            continue
        position += 2 + struct.unpack(">H", content[position + 2 : position + 4])[0]
    return None


def _bmp(content: bytes) -> tuple[int, int]:
    if struct.unpack("<I", content[14:18])[0] == 12:  # the oldest header has 16-bit sizes
        return struct.unpack("<HH", content[18:22])
    width, height = struct.unpack("<ii", content[18:26])
    return abs(width), abs(height)  # a negative height means that the first row is the top one


def _webp(content: bytes) -> tuple[int, int] | None:
    kind = content[12:16]
    if kind == b"VP8X":
        return (
            1 + int.from_bytes(content[24:27], "little"),
            1 + int.from_bytes(content[27:30], "little"),
        )
    if kind == b"VP8L":
        bits = struct.unpack("<I", content[21:25])[0]
        return 1 + (bits & 0x3FFF), 1 + (bits >> 14 & 0x3FFF)
    if kind == b"VP8 ":
        width, height = struct.unpack("<HH", content[26:30])
        return width & 0x3FFF, height & 0x3FFF
    return None


def _tiff(content: bytes) -> tuple[int, int] | None:
    """From tags 256 and 257 of the first directory."""
    order = "<" if content[:2] == b"II" else ">"
    start = struct.unpack(order + "I", content[4:8])[0]
    sizes = {}
    for entry in range(struct.unpack(order + "H", content[start : start + 2])[0]):
        at = start + 2 + 12 * entry
        tag, kind = struct.unpack(order + "HH", content[at : at + 4])
        if tag in (256, 257):
            layout = "H" if kind == 3 else "I"
            sizes[tag] = struct.unpack(order + layout, content[at + 8 : at + 8 + struct.calcsize(layout)])[0]
    return (sizes[256], sizes[257]) if len(sizes) == 2 else None
