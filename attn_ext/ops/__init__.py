"""From flat arguments to a backend: operators of torch.library, autograd, transforms."""
