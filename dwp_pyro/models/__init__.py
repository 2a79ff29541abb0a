"""Networks, likelihoods and the Pyro program of a segmentation."""
