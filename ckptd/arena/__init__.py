"""The memory that outlives the trainer: slots in shared memory, their allocation, sealing, leases and recycling.

Layer: above ``format``; knows nothing of gRPC, tiers or peers. Invariants: a sealed slot's bytes never change; the
arena never holds more than its budget; a kept or leased slot is never handed out.
"""
