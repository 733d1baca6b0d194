from contract import ImageCodecContract


class TestHyperprior(ImageCodecContract):
    model = "hyperprior:test"
