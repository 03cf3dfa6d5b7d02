"""What is to be measured where there is a GPU: `make gpu-check`. test_gpu_check.py goes its ways on the CPU."""
