"""The main job: fine-tune one pretrained classifier twice, dense under Inductor and under `backend="spt"`, and compare. `make demo`."""
