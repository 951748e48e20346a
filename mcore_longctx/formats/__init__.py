"""Files of weights, byte by byte: safetensors, torch_dist, torch.save archives. No numpy, no torch; nothing that is read can run."""
