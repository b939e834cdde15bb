"""Operations on tensors, one per file, each with its reference in plain torch."""
