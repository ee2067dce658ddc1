"""``ckptd demo``: one rehearsal of every failure a node can have, and the proof that training did not notice.

Layer: ``cli``. ``processes`` starts and kills, ``stage`` has the daemons and the jobs, ``journal`` compares two runs;
``acts`` is the plot with one node, ``cluster_acts`` with several, ``verb`` the flags and what is shown. Nothing here
imports torch: the training runs as a program of its own.
"""
