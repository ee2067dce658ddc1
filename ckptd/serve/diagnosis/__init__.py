"""Diagnosis: what this node's ranks do is collected, sent to the analyst of the run, and judged there."""
