"""The running daemon: gRPC services, the hand-over of slots, HTTP, and the wiring of all of it (``node``).

Layer: the top, under ``cli`` only. Services translate and check permissions; what they do lies in ``NodeRun``,
``Coordinator``, ``Drainer`` and the layers below.
"""
