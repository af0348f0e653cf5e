"""What unCLIP's two-part latent is good for: each a function of embeddings and latents (sections 3 and 4).

    codec = latents.Codec(unclip.UnCLIP.load("runs/quickstart"))
    encoded = codec.encode([picture])                                     # uint8 [h, w, 3]
    many = variations.repeated(encoded.latents, samples=4)
    codec.draw(many, eta=0.5, ids=range(4))["upsampler_2"]                # uint8 [4, 64, 64, 3]
"""
