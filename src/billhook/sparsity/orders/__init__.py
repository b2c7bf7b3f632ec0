"""The order of channels in which groups of N:M lose least."""
