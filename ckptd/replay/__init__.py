"""Recorded timings read from files: own recordings, Flight Recorder dumps, timelines. Layer beside ``restore``."""
