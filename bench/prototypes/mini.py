"""A four-layer 8B (or 1B): kernels of prompt steps and of few rows, timed one by one."""
import sys, json, dataclasses; sys.path[:0]=['bench','src']
import numpy as np
from pathlib import Path
import headrace.synth as synth, gpu
from headrace.gguf.reader import open_gguf
from headrace.model.loader import load_decoder
from headrace.cuda.runner import CUDARunner
from headrace.cuda.products import Tuning
from headrace.cuda.steps import Step
from headrace.backend import Batch, PAGE_SIZE
name=sys.argv[1] if len(sys.argv)>1 else 'llama-8b'
def mini(name, layers=4):
    p=Path(f'/tmp/mini-{name}.gguf')
    s=synth.SHAPES[name]
    f=dataclasses.fields(s)
    synth.SHAPES['mini']=dataclasses.replace(s, **{f[1].name: layers, f[7].name: 16384})
    if not p.exists(): synth.write_synthetic(p,'mini','Q4_K_M')
    return load_decoder(open_gguf(p))
def kinds(runner, n, prompt):
    ex=runner.executor; dev=ex.device
    pos=np.arange(n,dtype=np.int32) if prompt else np.zeros(n,np.int32)
    slots=np.zeros(n,np.int32) if prompt else np.arange(n,dtype=np.int32)
    table=(np.arange(-(-n//PAGE_SIZE),dtype=np.int32)[None] if prompt else np.arange(n,dtype=np.int32)[:,None])
    ex.bring(Batch(pos%100,pos,slots,table,np.array([n-1],np.int32)))
    step=Step(n,int(pos[-1])+1 if prompt else 64,((n-1,1),) if prompt else ((0,n),),prompt)
    found={}
    for op in runner.decoder.operations:
        for l in ex.lowering.lower(op,step): found.setdefault(f"{type(op).__name__} {l.spec.name}",[]).append(l)
    rows={}
    for kind,ls in found.items():
        rep=ls*(-(-16//len(ls)))
        dev.prepare(l.spec for l in ls)
        g=dev.capture(lambda: [dev.launch(l) for l in rep])
        us=gpu.timed(dev,g.launch)['median']/len(rep); g.close()
        w=sum(gpu.weight_count(l) for l in ls)/len(ls); b=sum(gpu.weight_bytes(l,runner) for l in ls)/len(ls)
        m=dict(ls[0].spec.macros)
        rows[kind]=(us, 2*n*w/us/1e6, b/us/1e3, f"T{m.get('TOKENS','')}/S{m.get('SPLITS','')}/st{m.get('STAGES','')} grid {ls[0].grid}")
    return rows
def show(title, rows):
    print(title, flush=True)
    for k,(us,tf,gb,what) in rows.items(): print(f"   {k:26} {us:8.1f} us {tf:6.1f} TF {gb:7.0f} GB/s {what}", flush=True)
import headrace.cuda.lowering as LW
_gemm=LW.gemm.gemm
def alone(*a,**k):
    m=dict(k.pop('macros',None) or {})
    if a[4]<=32 and k.get('work') is not None: m['TOGETHER']=0
    return _gemm(*a,macros=m,**k)
if __name__=='__main__':
    d=mini(name)
    for mode in sys.argv[2:] or ('gemm',):
        r=CUDARunner(d,max_rows=256,tensor_rows=None if mode=='dots' else 1,prompt_rows=2048 if mode=='gemm' else 0)
        r.allocate_cache(300)
        if mode=='alone': LW.gemm.gemm=alone
        if mode=='gemm':
            for n in (128,512,1024,2048): show(f'{name} prompt {n}',kinds(r,n,True))
        for n in (8,16,32,64,128,256) if mode=='gemm' else (1,2,4,8,16,32): show(f'{name} {mode} few {n}',kinds(r,n,False))
        r.close()
