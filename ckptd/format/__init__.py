"""The bytes of slots, shard indexes, trees and tier layout: the only reader and writer of each (docs/FORMAT.md).

Layer: above ``model`` and ``errors``, below everything else; pure (standard library, NumPy and the crc32c package), no
I/O beyond buffers it is handed. Invariants: every format carries its version, and a newer one is refused by name.
"""
