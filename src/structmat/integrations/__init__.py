"""Other libraries' ways of saving, loading and training, for structured networks.

Every module here imports its framework at the top, and is itself imported only where the framework is in use. The core
knows none of them.
"""
