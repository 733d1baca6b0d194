"""Context models of the latent y: which already decoded values predict the next ones."""
