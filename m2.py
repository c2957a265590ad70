import torch,numpy as np,time
torch.set_num_threads(1)
for n in (2500,20000):
    X=torch.randn(n,1024,dtype=torch.float64)*torch.arange(1,1025)**-.5
    for name,f in dict(svdvals=lambda:torch.linalg.svdvals(X),svd=lambda:torch.linalg.svd(X,full_matrices=False),np_svd=lambda:np.linalg.svd(X.numpy(),full_matrices=False),np_vals=lambda:np.linalg.svd(X.numpy(),compute_uv=False)).items():
        a=time.process_time(); f(); print(n,name,round(time.process_time()-a,2),flush=True)
