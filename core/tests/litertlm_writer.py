"""A small writer of ``.litertlm`` files, for tests of what reads them."""

import struct

MAGIC = b"LITERTLM"
STRING = 9


def flatbuffer(root):
    """Bytes of a table: field -> ``(code, number)``, text, list of whole numbers, list of tables, or table."""
    out = bytearray(4)
    struct.pack_into("<I", out, 0, _write(out, root))
    return bytes(out)


def _write(out, node):
    if isinstance(node, str):
        node = node.encode()
        place = len(out)
        out += struct.pack("<I", len(node)) + node
        return place
    if isinstance(node, list):
        place = len(out)
        out += struct.pack("<I", len(node))
        if node and isinstance(node[0], int):
            out += struct.pack(f"<{len(node)}i", *node)
            return place
        start = len(out)
        out += bytes(4 * len(node))
        for index, item in enumerate(node):
            _point(out, start + 4 * index, _write(out, item))
        return place
    count = max(node, default=-1) + 1
    vtable = len(out)
    place = vtable + 4 + 2 * count
    offsets = {field: 4 + 8 * index for index, field in enumerate(node)}
    out += struct.pack("<HH", 4 + 2 * count, 4 + 8 * len(node))
    out += b"".join(struct.pack("<H", offsets.get(field, 0)) for field in range(count))
    out += struct.pack("<i", place - vtable) + bytes(8 * len(node))
    for field, value in node.items():
        at = place + offsets[field]
        if isinstance(value, tuple):
            struct.pack_into(f"<{value[0]}", out, at, value[1])
        else:
            _point(out, at, _write(out, value))
    return place


def _point(out, at, place):
    struct.pack_into("<I", out, at, place - at)


def message(*fields):
    """A protobuf message of (number, whole number or bytes)."""
    out = b""
    for number, value in fields:
        if isinstance(value, int):
            out += varint(number << 3) + varint(value)
        else:
            out += varint(number << 3 | 2) + varint(len(value)) + value
    return out


def varint(value):
    out = b""
    while value > 0x7F:
        out += bytes([value & 0x7F | 0x80])
        value >>= 7
    return out + bytes([value])


def tflite(*, k=4, cache=512):
    """A model with the signatures ``decode`` and, for drafts, ``verify``; its one constant is int8."""
    tensors = [{0: [1, 1, 1, cache]}, {0: [k + 1]}, {0: [64, 32], 1: ("b", 9)}, {0: [1, 64]}]
    signatures = [{0: [{0: "mask", 1: ("I", 0)}], 2: "decode"}, {0: [{0: "input_pos", 1: ("I", 1)}], 2: "verify"}]
    graph = {0: tensors, 1: [0, 1], 3: [{2: [3]}]}
    return flatbuffer({2: [graph], 7: signatures[: 2 if k else 1]})


METADATA = message(
    (1, message((2, b"<bos>"))),
    (2, message((1, message((1, b"\x01"))))),
    (2, message((1, message((1, b"\x6a\x0a"))))),
    (2, message((2, b"<turn|>"))),
    (3, message((1, message((1, b"U:"), (2, b"\n"))), (2, message((1, b"M:"))))),
    (5, 480),
    (6, message((8, b""))),
    (7, b"{{ messages }}"),
    (14, b"0.11.0"),
)
SECTIONS = (
    (5, {}, METADATA),
    (3, {"model_type": "tf_lite_prefill_decode"}, tflite()),
    (3, {"model_type": "tf_lite_mtp_drafter"}, b"drafter"),
)


def litertlm(sections=SECTIONS, *, version=(1, 5, 0), magic=MAGIC, header_end=None, places=None):
    """A file of sections (number of the kind, items, contents); ``places`` replaces (begin, end) of sections."""
    at, objects, data = 16384, [], b""
    for index, (kind, items, contents) in enumerate(sections):
        begin, end = (places or {}).get(index, (at, at + len(contents)))
        pairs = [{0: name, 1: ("B", STRING), 2: {0: text}} for name, text in items.items()]
        objects.append({0: pairs, 1: ("Q", begin), 2: ("Q", end), 3: ("B", kind)})
        data += contents
        at += len(contents)
    header = flatbuffer({0: {0: []}, 1: {0: objects}})
    start = magic + struct.pack("<IIIIQ", *version, 0, 32 + len(header) if header_end is None else header_end)
    return (start + header).ljust(16384, b"\0") + data
