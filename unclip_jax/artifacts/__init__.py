"""What an export writes: weights, compiled samplers, folders of other libraries, and the card that describes them."""
