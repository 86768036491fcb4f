"""A campaign of faults against real processes, and a checker of its history (docs/faults.rst).

``python -m campaigns.faults --seconds 600 --seed 7``, or ``make faults ARGS=…``.
"""
