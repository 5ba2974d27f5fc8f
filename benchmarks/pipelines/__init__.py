"""One GPT in stages on two ranks: bytes and seconds a step beside torch.distributed.pipelining."""
