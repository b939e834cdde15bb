"""What runs next: queues, admission, chunking, pre-emption and stopping, in plain ints."""
