"""What CLIP's image embeddings hold, seen through the decoder (Ramesh et al., 2022, sections 2.2, 4 and 7)."""
