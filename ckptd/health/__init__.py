"""How the node itself is: samples of the operating system and of devices. Layer beside ``restore``."""
