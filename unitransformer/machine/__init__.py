"""What a machine reaches at best: matrix products, copying, collectives."""
