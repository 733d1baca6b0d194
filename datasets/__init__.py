"""Named data sets: where they come from, how to know that they are the right ones, and what they may be used for."""
