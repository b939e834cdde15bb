"""Running a step: tensors, KV storage, sampling."""
