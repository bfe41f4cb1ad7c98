"""What happens around training: batch-norm adaptation."""
