"""The commands, one file each; they import what they compute with when they run, so that ``--help`` is instant."""
