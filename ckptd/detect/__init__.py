"""From timings of collectives to faults. Pure: no clock, no socket, no file; layer beside ``erasure``."""
