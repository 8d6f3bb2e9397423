import sys; sys.path[:0]=['bench','src','bench/prototypes']
import ctypes, numpy as np, itertools
from pathlib import Path
from headrace.cuda import compile as C, launchers
from headrace.cuda.gpu import CUDADevice
from headrace.cuda.device import Launch, array
import gpu
K=Path('/tmp/kernels'); K.mkdir(exist_ok=True)
import shutil
for f in C.KERNELS.iterdir(): shutil.copy(f,K)
shutil.copy('bench/prototypes/one_kernel.cu',K/'proto.cu')
C.KERNELS=K
dev=CUDADevice()
LAYERS=32
layer=(6144*4096+4096*4096+28672*4096+4096*14336)//256*144
w=dev.allocate(layer*LAYERS,'w')
chunk=np.frombuffer(np.random.default_rng(1).bytes(1<<26),np.uint8).copy()
# blocks of 144: scales tiny and sane
tile=chunk[:len(chunk)//2304*2304].reshape(-1,2304); 
hd=tile[:,:256].reshape(-1,16,16); hd[:,:,0]=0x10; hd[:,:,1]=0x08; hd[:,:,2]=0x10; hd[:,:,3]=0x08  # d, dmin about 1e-4
flat=tile.reshape(-1)
dev.upload(w,flat)
done=flat.size
while done<layer*LAYERS:
    n=min(done,layer*LAYERS-done); dev.copy(w+done,w,n); done+=n
x=dev.allocate(1<<20,'x'); att=dev.allocate(1<<20,'a'); hid=dev.allocate(1<<20,'h'); q=dev.allocate(1<<20,'q'); gain=dev.allocate(1<<16,'g'); cnt=dev.allocate(256,'c'); clk=dev.allocate(1<<16,'k')
class A(ctypes.Structure): _fields_=[(n,ctypes.c_void_p) for n in('weights','x','attention','hidden','q','gain','counter','clocks')]+[('layers',ctypes.c_int)]
dev.upload(gain,np.ones(4096,np.float32))
ceil=gpu.read_ceiling(dev); print('ceiling',round(ceil['gb_per_s']))
def go(**m):
    spec=C.Specialisation.of('proto',m)
    slots=m.get('SLOTS',80)
    shared=slots*2304+slots*16+14336*3//2+3100*4+64
    l=Launch(spec,(m.get('NSM',132),1,1),544,shared,A(w,x,att,hid,q,gain,cnt,clk,LAYERS))
    def once():
        dev.clear(cnt,4); dev.launch(l)
    for p in (x,att,hid,q): dev.clear(p,1<<20)
    dev.upload(x+4096*4,np.random.default_rng(0).standard_normal(4096).astype(np.float32))
    try:
        t=gpu.timed(dev,once)
    except Exception as e: print(m,'FAILED',repr(e)[:200]); raise
    n=m.get('NSM',132); c=dev.download(array(clk,(n,16),np.uint64)).astype(np.int64)[:,:13]; d=np.diff(c,axis=1)/1000
    b=np.median(d,axis=0); work=d[:,[1,4,7,10]]
    fin=(c[:,[2,5,8,11]]-c[:,[2,5,8,11]].min(0))/1000
    print('   slowest less quickest at the end of qkv, out, ffn, down:',fin.max(0).round(1), 'median', np.median(fin,axis=0).round(1), 'barrier after the last:', ((c[:,[3,6,9,12]].min(0)-c[:,[2,5,8,11]].max(0))/1000).round(2), flush=True)
    c=b
    print(m,f"{t['median']:.0f} us ({t['low']:.0f}-{t['high']:.0f}) {layer*LAYERS/t['median']/1e3/ceil['gb_per_s']:.1%} of ceiling; layer {t['median']/LAYERS:.1f}; load,qkv,bar,att+bar,out,bar,load,ffn,bar,load,down,bar:",' '.join(f'{v:.1f}' for v in c),flush=True)
for a in sys.argv[1:]:
    go(**{k:int(v) for k,v in (p.split('=') for p in a.split(','))})
