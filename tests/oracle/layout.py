# Copyright (C) 2026 The qcow2 livebackup authors
# SPDX-License-Identifier: GPL-2.0-or-later
"""Tables of fields: one for each structure serves decoder and encoder.

Part of the independent implementation in this directory.
"""

import uuid

ZERO_UUID = str(uuid.UUID(int=0))


class Layout:
    """A fixed run of fields: (name, size, type), type int, uuid or raw."""

    def __init__(self, order, *fields):
        self.order = order             # "little" or "big"
        self.fields = []
        position = 0
        for name, size, kind in fields:
            self.fields.append((name, position, size, kind))
            position += size
        self.size = position

    def decode(self, data, start=0):
        """Return {name: value} of the bytes at `start`."""
        values = {}
        for name, position, size, kind in self.fields:
            raw = bytes(data[start + position:start + position + size])
            if kind == "int":
                values[name] = int.from_bytes(raw, self.order)
            elif kind == "uuid":
                values[name] = str(uuid.UUID(bytes=raw))
            else:
                values[name] = raw
        return values

    def encode(self, values):
        """The inverse of decode(); a missing field is zero."""
        return b"".join(self.encode_field(name, values.get(name, 0))
                        for name, _, _, _ in self.fields)

    def encode_field(self, field, value):
        """Bytes of one field; raw ones are padded with zeroes."""
        _, size, kind = self.find(field)
        if kind == "int":
            return int(value).to_bytes(size, self.order)
        if kind == "uuid" and not str(value).startswith("hex:"):
            return uuid.UUID(value or ZERO_UUID).bytes
        return to_raw(value)[:size].ljust(size, b"\0")

    def find(self, field):
        """(offset, size, type) of a field."""
        for name, position, size, kind in self.fields:
            if name == field:
                return position, size, kind
        raise KeyError(field)

    def offset_of(self, field):
        """Where a field begins within the structure."""
        return self.find(field)[0]

    def spans(self, start, prefix):
        """Yield (name, offset, length) of each field."""
        for name, position, size, _ in self.fields:
            yield f"{prefix}.{name}", start + position, size


def to_raw(value):
    """Bytes of a raw field given as bytes, text, "hex:..." or 0."""
    if isinstance(value, bytes):
        return value
    if isinstance(value, str):
        if value.startswith("hex:"):
            return bytes.fromhex(value[4:])
        return value.encode()
    return b""


def printable(values):
    """Make decoded values fit for JSON; reserved fields are left out."""
    return {name: value.rstrip(b"\0").decode("latin-1")
            if isinstance(value, bytes) else value
            for name, value in values.items()
            if not name.startswith("reserved") and name != "kind_name"}
