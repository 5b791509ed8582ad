"""Other libraries' ways of saving, loading and training, for structured networks.

Each module imports its framework at the top and is imported only where that framework is in use; the core knows none.
"""
