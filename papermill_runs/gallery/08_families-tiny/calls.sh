vpw regions scenes papermill_runs/regions/families --epochs 8
vpw run 09_visual_init --name families-deep -p visual grid -p images 0 -p epochs 2 -p checkpoint_every 200 -p overrides '{"visual.backbone": "resnet18"}'
vpw run 01_pretrain --name families-swin-random-0 -p visual swin -p masking random -p seed 0 -p steps 0 -p checkpoint_every 200
vpw run 02_probe --name families-swin-random-0 -p checkpoint families-swin-random-0 -p images 128
vpw run 04_finetune --name families-swin-random-0 -p task vqa -p checkpoint families-swin-random-0 -p seed 0 -p steps 0 -p checkpoint_every 200
vpw run 01_pretrain --name families-grid-random-0 -p visual grid -p masking random -p seed 0 -p steps 0 -p checkpoint_every 200
vpw run 02_probe --name families-grid-random-0 -p checkpoint families-grid-random-0 -p images 128
vpw run 04_finetune --name families-grid-random-0 -p task vqa -p checkpoint families-grid-random-0 -p seed 0 -p steps 0 -p checkpoint_every 200
vpw run 01_pretrain --name families-patch-random-0 -p visual patch -p masking random -p seed 0 -p steps 0 -p checkpoint_every 200 -p overrides '{"visual.frozen": false, "optim.lr_visual": 0.0002}'
vpw run 02_probe --name families-patch-random-0 -p checkpoint families-patch-random-0 -p images 128
vpw run 04_finetune --name families-patch-random-0 -p task vqa -p checkpoint families-patch-random-0 -p seed 0 -p steps 0 -p checkpoint_every 200
vpw run 01_pretrain --name families-regions-random-0 -p visual regions -p masking random -p seed 0 -p steps 0 -p checkpoint_every 200 -p regions papermill_runs/regions/families
vpw run 02_probe --name families-regions-random-0 -p checkpoint families-regions-random-0 -p images 128
vpw run 04_finetune --name families-regions-random-0 -p task vqa -p checkpoint families-regions-random-0 -p seed 0 -p steps 0 -p checkpoint_every 200
vpw run 01_pretrain --name families-grid-code-0 -p visual grid -p masking code -p seed 0 -p steps 0 -p checkpoint_every 200 -p overrides '{"visual.dictionary": 2048, "optim.lr_visual": 1e-05}'
vpw run 02_probe --name families-grid-code-0 -p checkpoint families-grid-code-0 -p images 128
vpw run 04_finetune --name families-grid-code-0 -p task vqa -p checkpoint families-grid-code-0 -p seed 0 -p steps 0 -p checkpoint_every 200
vpw run 01_pretrain --name families-grid-none-0 -p visual grid -p masking none -p seed 0 -p steps 0 -p checkpoint_every 200
vpw run 02_probe --name families-grid-none-0 -p checkpoint families-grid-none-0 -p images 128
vpw run 04_finetune --name families-grid-none-0 -p task vqa -p checkpoint families-grid-none-0 -p seed 0 -p steps 0 -p checkpoint_every 200
vpw run 01_pretrain --name families-deep-none-0 -p visual grid -p masking none -p seed 0 -p steps 0 -p checkpoint_every 200 -p overrides '{"visual.backbone": "resnet18"}' -p init_visual papermill_runs/09_visual_init/families-deep/checkpoint/visual.safetensors
vpw run 02_probe --name families-deep-none-0 -p checkpoint families-deep-none-0 -p images 128
vpw run 04_finetune --name families-deep-none-0 -p task vqa -p checkpoint families-deep-none-0 -p seed 0 -p steps 0 -p checkpoint_every 200
vpw run 01_pretrain --name families-swin-none-0 -p visual swin -p masking none -p seed 0 -p steps 0 -p checkpoint_every 200
vpw run 02_probe --name families-swin-none-0 -p checkpoint families-swin-none-0 -p images 128
vpw run 04_finetune --name families-swin-none-0 -p task vqa -p checkpoint families-swin-none-0 -p seed 0 -p steps 0 -p checkpoint_every 200
vpw run 01_pretrain --name families-swin-attention-0 -p visual swin -p masking attention -p seed 0 -p steps 0 -p checkpoint_every 200
vpw run 02_probe --name families-swin-attention-0 -p checkpoint families-swin-attention-0 -p images 128
vpw run 04_finetune --name families-swin-attention-0 -p task vqa -p checkpoint families-swin-attention-0 -p seed 0 -p steps 0 -p checkpoint_every 200
vpw run 01_pretrain --name families-swin-random-1 -p visual swin -p masking random -p seed 1 -p steps 0 -p checkpoint_every 200
vpw run 02_probe --name families-swin-random-1 -p checkpoint families-swin-random-1 -p images 128
vpw run 04_finetune --name families-swin-random-1 -p task vqa -p checkpoint families-swin-random-1 -p seed 1 -p steps 0 -p checkpoint_every 200
vpw run 01_pretrain --name families-grid-random-1 -p visual grid -p masking random -p seed 1 -p steps 0 -p checkpoint_every 200
vpw run 02_probe --name families-grid-random-1 -p checkpoint families-grid-random-1 -p images 128
vpw run 04_finetune --name families-grid-random-1 -p task vqa -p checkpoint families-grid-random-1 -p seed 1 -p steps 0 -p checkpoint_every 200
vpw run 01_pretrain --name families-patch-random-1 -p visual patch -p masking random -p seed 1 -p steps 0 -p checkpoint_every 200 -p overrides '{"visual.frozen": false, "optim.lr_visual": 0.0002}'
vpw run 02_probe --name families-patch-random-1 -p checkpoint families-patch-random-1 -p images 128
vpw run 04_finetune --name families-patch-random-1 -p task vqa -p checkpoint families-patch-random-1 -p seed 1 -p steps 0 -p checkpoint_every 200
vpw run 01_pretrain --name families-regions-random-1 -p visual regions -p masking random -p seed 1 -p steps 0 -p checkpoint_every 200 -p regions papermill_runs/regions/families
vpw run 02_probe --name families-regions-random-1 -p checkpoint families-regions-random-1 -p images 128
vpw run 04_finetune --name families-regions-random-1 -p task vqa -p checkpoint families-regions-random-1 -p seed 1 -p steps 0 -p checkpoint_every 200
vpw run 01_pretrain --name families-grid-code-1 -p visual grid -p masking code -p seed 1 -p steps 0 -p checkpoint_every 200 -p overrides '{"visual.dictionary": 2048, "optim.lr_visual": 1e-05}'
vpw run 02_probe --name families-grid-code-1 -p checkpoint families-grid-code-1 -p images 128
vpw run 04_finetune --name families-grid-code-1 -p task vqa -p checkpoint families-grid-code-1 -p seed 1 -p steps 0 -p checkpoint_every 200
vpw run 01_pretrain --name families-grid-none-1 -p visual grid -p masking none -p seed 1 -p steps 0 -p checkpoint_every 200
vpw run 02_probe --name families-grid-none-1 -p checkpoint families-grid-none-1 -p images 128
vpw run 04_finetune --name families-grid-none-1 -p task vqa -p checkpoint families-grid-none-1 -p seed 1 -p steps 0 -p checkpoint_every 200
vpw run 01_pretrain --name families-deep-none-1 -p visual grid -p masking none -p seed 1 -p steps 0 -p checkpoint_every 200 -p overrides '{"visual.backbone": "resnet18"}' -p init_visual papermill_runs/09_visual_init/families-deep/checkpoint/visual.safetensors
vpw run 02_probe --name families-deep-none-1 -p checkpoint families-deep-none-1 -p images 128
vpw run 04_finetune --name families-deep-none-1 -p task vqa -p checkpoint families-deep-none-1 -p seed 1 -p steps 0 -p checkpoint_every 200
vpw run 01_pretrain --name families-swin-none-1 -p visual swin -p masking none -p seed 1 -p steps 0 -p checkpoint_every 200
vpw run 02_probe --name families-swin-none-1 -p checkpoint families-swin-none-1 -p images 128
vpw run 04_finetune --name families-swin-none-1 -p task vqa -p checkpoint families-swin-none-1 -p seed 1 -p steps 0 -p checkpoint_every 200
vpw run 01_pretrain --name families-swin-attention-1 -p visual swin -p masking attention -p seed 1 -p steps 0 -p checkpoint_every 200
vpw run 02_probe --name families-swin-attention-1 -p checkpoint families-swin-attention-1 -p images 128
vpw run 04_finetune --name families-swin-attention-1 -p task vqa -p checkpoint families-swin-attention-1 -p seed 1 -p steps 0 -p checkpoint_every 200
vpw run 01_pretrain --name families-swin-random-2 -p visual swin -p masking random -p seed 2 -p steps 0 -p checkpoint_every 200
vpw run 02_probe --name families-swin-random-2 -p checkpoint families-swin-random-2 -p images 128
vpw run 04_finetune --name families-swin-random-2 -p task vqa -p checkpoint families-swin-random-2 -p seed 2 -p steps 0 -p checkpoint_every 200
vpw run 01_pretrain --name families-grid-random-2 -p visual grid -p masking random -p seed 2 -p steps 0 -p checkpoint_every 200
vpw run 02_probe --name families-grid-random-2 -p checkpoint families-grid-random-2 -p images 128
vpw run 04_finetune --name families-grid-random-2 -p task vqa -p checkpoint families-grid-random-2 -p seed 2 -p steps 0 -p checkpoint_every 200
vpw run 01_pretrain --name families-patch-random-2 -p visual patch -p masking random -p seed 2 -p steps 0 -p checkpoint_every 200 -p overrides '{"visual.frozen": false, "optim.lr_visual": 0.0002}'
vpw run 02_probe --name families-patch-random-2 -p checkpoint families-patch-random-2 -p images 128
vpw run 04_finetune --name families-patch-random-2 -p task vqa -p checkpoint families-patch-random-2 -p seed 2 -p steps 0 -p checkpoint_every 200
vpw run 01_pretrain --name families-regions-random-2 -p visual regions -p masking random -p seed 2 -p steps 0 -p checkpoint_every 200 -p regions papermill_runs/regions/families
vpw run 02_probe --name families-regions-random-2 -p checkpoint families-regions-random-2 -p images 128
vpw run 04_finetune --name families-regions-random-2 -p task vqa -p checkpoint families-regions-random-2 -p seed 2 -p steps 0 -p checkpoint_every 200
vpw run 01_pretrain --name families-grid-code-2 -p visual grid -p masking code -p seed 2 -p steps 0 -p checkpoint_every 200 -p overrides '{"visual.dictionary": 2048, "optim.lr_visual": 1e-05}'
vpw run 02_probe --name families-grid-code-2 -p checkpoint families-grid-code-2 -p images 128
vpw run 04_finetune --name families-grid-code-2 -p task vqa -p checkpoint families-grid-code-2 -p seed 2 -p steps 0 -p checkpoint_every 200
vpw run 01_pretrain --name families-grid-none-2 -p visual grid -p masking none -p seed 2 -p steps 0 -p checkpoint_every 200
vpw run 02_probe --name families-grid-none-2 -p checkpoint families-grid-none-2 -p images 128
vpw run 04_finetune --name families-grid-none-2 -p task vqa -p checkpoint families-grid-none-2 -p seed 2 -p steps 0 -p checkpoint_every 200
vpw run 01_pretrain --name families-deep-none-2 -p visual grid -p masking none -p seed 2 -p steps 0 -p checkpoint_every 200 -p overrides '{"visual.backbone": "resnet18"}' -p init_visual papermill_runs/09_visual_init/families-deep/checkpoint/visual.safetensors
vpw run 02_probe --name families-deep-none-2 -p checkpoint families-deep-none-2 -p images 128
vpw run 04_finetune --name families-deep-none-2 -p task vqa -p checkpoint families-deep-none-2 -p seed 2 -p steps 0 -p checkpoint_every 200
vpw run 01_pretrain --name families-swin-none-2 -p visual swin -p masking none -p seed 2 -p steps 0 -p checkpoint_every 200
vpw run 02_probe --name families-swin-none-2 -p checkpoint families-swin-none-2 -p images 128
vpw run 04_finetune --name families-swin-none-2 -p task vqa -p checkpoint families-swin-none-2 -p seed 2 -p steps 0 -p checkpoint_every 200
vpw run 01_pretrain --name families-swin-attention-2 -p visual swin -p masking attention -p seed 2 -p steps 0 -p checkpoint_every 200
vpw run 02_probe --name families-swin-attention-2 -p checkpoint families-swin-attention-2 -p images 128
vpw run 04_finetune --name families-swin-attention-2 -p task vqa -p checkpoint families-swin-attention-2 -p seed 2 -p steps 0 -p checkpoint_every 200
