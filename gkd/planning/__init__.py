"""What a run will cost, from the models' configs alone: memory, seconds, bytes on the wires. Imports no torch."""
