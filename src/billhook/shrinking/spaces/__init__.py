"""Makes what a search chooses among: places, and whole blocks with the places in them."""
