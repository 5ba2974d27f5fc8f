"""One GPT on two ranks: bytes and seconds a step beside DistributedDataParallel and FSDP2."""
