"""The peak of one rank's memory over a step, and what it is made of."""
