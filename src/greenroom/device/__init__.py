"""What acts: tensors, host memory, copies."""
