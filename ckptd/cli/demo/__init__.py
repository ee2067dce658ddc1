"""``ckptd demo``: one rehearsal of every failure a node can have, and the proof that training did not notice.

Layer: ``cli``. ``processes`` starts and kills, ``acts`` is the plot, ``verb`` the flags and what is shown. Nothing here
imports torch: the training runs as a program of its own.
"""
