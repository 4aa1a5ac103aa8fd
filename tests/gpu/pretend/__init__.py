"""A pretended card: stubs of the CUDA libraries under PyTorch's own CUDA build.

All code of the host runs for real: the allocator, autocast, DDP, FSDP2, Inductor and Triton. The
kernels are counted and do nothing, and the card's memory cannot be read, so that values mean
nothing: what comes back from the card is zero, and a single byte is one (yes, it is finite). Where
tensors are, their shapes, launches, copies, waits of the host and the allocator's memory are those
of a real card, but for the workspaces of cuDNN.

    python -m tests.gpu.pretend COMMAND ...    run a command with the card
    pytest -m pretend_gpu                      its tests, from inside such a command

`sources/` is the card (C++), `build.py` compiles it, `card.py` reads what it has counted.
"""
