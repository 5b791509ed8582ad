"""Looking at what a network has become: the report, numbers of a learned structure, and pictures."""
