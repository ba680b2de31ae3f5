"""Settings that several rooms use, and how their values are read; imports nothing of the rooms above."""
