"""How fast this is beside other ways to do the same work; ``make bench`` runs them."""
