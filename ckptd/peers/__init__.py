"""What daemons tell each other: the progress of a run's ranks and the watermarks that follow from it.

Layer: above ``arena``, beside ``tiers``. ``ledger`` and ``pace`` are pure: time comes in as an argument.
"""
