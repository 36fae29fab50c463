/* Copyright (c) the kestrel.py authors. MIT License, see LICENSE.
 *
 * qload: bounded load generator for queue servers on loopback.
 * One thread, epoll, C connections, each keeping P requests in flight.
 *   cc -O2 -o qload bench/qload.c -lpthread
 *   qload -p PORT [-h HOST] [-m put|get|flood|churn|reliable|mixed] [-k mc|bs|redis]
 *         [-c CONNS] [-n OPS] [-s SIZE] [-P DEPTH] [-q QUEUE] [-N QUEUES]
 * put      every connection enqueues; get: every one dequeues; reliable: get q/close/open
 * flood    half the connections put, half get (t=... wait), until n items were received
 * churn    connect, put one, close, again (n times over c slots)
 * -T MS    gets wait so long (default 1000; 0: plain gets); -C N: consumers of a flood (default half); -N N: spread over N queues
 * rflood   flood with consumers that get q/close/open
 * Prints one line: mode ops seconds ops/s p50 p99 p99.9 max (usec) errors misses
 */
#define _GNU_SOURCE
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>
#include <errno.h>
#include <time.h>
#include <fcntl.h>
#include <sys/socket.h>
#include <sys/epoll.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <arpa/inet.h>

static double now(void){struct timespec t;clock_gettime(CLOCK_MONOTONIC,&t);return t.tv_sec+t.tv_nsec*1e-9;}
enum {MC,BS,RD}; enum {PUT,GET,RELIABLE,CHURN};
static const char*host="127.0.0.1",*queue="spam";static int port=22133,conns=1,size=1024,depth=1,proto=MC,nq=1,wait_ms=1000;
static long total=100000;
typedef struct{int fd,kind,id;long sent,done;char*out;size_t outlen,outoff;char*in;size_t inlen,incap;double*t0;int th,tt;int opened;} conn_t;
static conn_t*cs;static int ep;static char*body;
static long issued[2],finished,got,misses,errors_;static long target_put,target_get;
static unsigned*lat;static long nlat;
static int putside(int k){return k==PUT||k==CHURN?0:1;}
static int mkreq(conn_t*c,char*b){ /* returns length */
  char q[64]; if(nq>1) snprintf(q,64,"%s%d",queue,(int)((c->id+c->sent)%nq)); else snprintf(q,64,"%s",queue);
  int n=0;
  if(proto==MC){
    if(putside(c->kind)==0){n=sprintf(b,"set %s 0 0 %d\r\n",q,size);memcpy(b+n,body,size);n+=size;memcpy(b+n,"\r\n",2);n+=2;}
    else if(wait_ms==0) n=sprintf(b,"get %s%s\r\n",q,c->kind==RELIABLE?"/close/open":"");
    else n=sprintf(b,"get %s%s/t=%d\r\n",q,c->kind==RELIABLE?"/close/open":"",wait_ms);
  } else if(proto==BS){
    if(putside(c->kind)==0){n=sprintf(b,"put 0 0 60 %d\r\n",size);memcpy(b+n,body,size);n+=size;memcpy(b+n,"\r\n",2);n+=2;}
    else n=sprintf(b,"reserve-with-timeout 1\r\n");
  } else {
    if(putside(c->kind)==0){n=sprintf(b,"*3\r\n$5\r\nLPUSH\r\n$%d\r\n%s\r\n$%d\r\n",(int)strlen(q),q,size);memcpy(b+n,body,size);n+=size;memcpy(b+n,"\r\n",2);n+=2;}
    else n=sprintf(b,"*3\r\n$5\r\nBRPOP\r\n$%d\r\n%s\r\n$1\r\n1\r\n",(int)strlen(q),q);
  }
  return n;
}
static void want(conn_t*c,int w){struct epoll_event e={.events=EPOLLIN|(w?EPOLLOUT:0),.data.ptr=c};epoll_ctl(ep,EPOLL_CTL_MOD,c->fd,&e);}
static void flushout(conn_t*c){
  while(c->outoff<c->outlen){ssize_t r=send(c->fd,c->out+c->outoff,c->outlen-c->outoff,MSG_NOSIGNAL);
    if(r<0){if(errno==EAGAIN){want(c,1);return;} perror("send");errors_++;return;} c->outoff+=r;}
  c->outlen=c->outoff=0; 
}
static void pump(conn_t*c){
  int side=putside(c->kind); long tgt=side?target_get:target_put; char*b=c->out+c->outlen;
  double t=now(); int any=0;
  while(c->sent-c->done<depth){
    if(side==0&&issued[0]>=tgt)break; if(side==1&&(got+ (issued[1]-finished))>=tgt+depth*conns*4)break;
    if(side==1&&got>=tgt)break;
    int n=mkreq(c,b); b+=n;c->outlen+=n; c->t0[c->tt]=t;c->tt=(c->tt+1)%(depth+1);c->sent++;issued[side]++;any=1;
  }
  if(any)flushout(c);
}
static int opencon(conn_t*c){
  c->fd=socket(AF_INET,SOCK_STREAM,0);int one=1;setsockopt(c->fd,IPPROTO_TCP,TCP_NODELAY,&one,sizeof one);
  struct sockaddr_in a={.sin_family=AF_INET,.sin_port=htons(port)};inet_pton(AF_INET,host,&a.sin_addr);
  if(connect(c->fd,(void*)&a,sizeof a)<0){perror("connect");return -1;}
  fcntl(c->fd,F_SETFL,O_NONBLOCK);struct epoll_event e={.events=EPOLLIN,.data.ptr=c};epoll_ctl(ep,EPOLL_CTL_ADD,c->fd,&e);return 0;
}
/* parse one reply; return bytes consumed, 0 if incomplete; *kind: 1 ok/stored 2 item 3 miss 4 error */
static size_t parse(conn_t*c,char*p,size_t n,int*kind){
  char*e=memchr(p,'\n',n); if(!e)return 0; size_t l=e-p+1;
  if(proto==MC){
    if(!memcmp(p,"STORED",6)){*kind=1;return l;}
    if(!memcmp(p,"VALUE ",6)){char*sp=e;while(sp>p&&*sp!=' ')sp--;long len=atol(sp+1);size_t need=l+len+2+5;if(n<need)return 0;*kind=2;return need;}
    if(!memcmp(p,"END",3)){*kind=3;return l;}
    *kind=4;return l;
  } else if(proto==BS){
    if(!memcmp(p,"INSERTED",8)){*kind=1;return l;}
    if(!memcmp(p,"RESERVED ",9)){long id,len;sscanf(p,"RESERVED %ld %ld",&id,&len);size_t need=l+len+2;if(n<need)return 0;*kind=2;
      char d[64];int dn=sprintf(d,"delete %ld\r\n",id);memcpy(c->out+c->outlen,d,dn);c->outlen+=dn;return need;}
    if(!memcmp(p,"DELETED",7)){*kind=0;return l;}
    if(!memcmp(p,"TIMED_OUT",9)){*kind=3;return l;}
    *kind=4;return l;
  } else {
    if(p[0]==':'){*kind=1;return l;}
    if(p[0]=='*'){ if(p[1]=='-'){*kind=3;return l;}
      size_t o=l;for(int i=0;i<2;i++){char*f=memchr(p+o,'\n',n-o);if(!f)return 0;long len=atol(p+o+1);o=(f-p)+1+len+2;if(n<o)return 0;}*kind=2;return o;}
    *kind=4;return l;
  }
}
int main(int ac,char**av){
  int o;const char*mode="put";int consumers=-1;
  while((o=getopt(ac,av,"h:p:m:k:c:n:s:P:q:N:C:T:"))!=-1)switch(o){case'h':host=optarg;break;case'p':port=atoi(optarg);break;case'm':mode=optarg;break;
    case'k':proto=!strcmp(optarg,"bs")?BS:!strcmp(optarg,"redis")?RD:MC;break;case'c':conns=atoi(optarg);break;case'n':total=atol(optarg);break;
    case's':size=atoi(optarg);break;case'P':depth=atoi(optarg);break;case'q':queue=optarg;break;case'N':nq=atoi(optarg);break;case'C':consumers=atoi(optarg);break;case'T':wait_ms=atoi(optarg);break;default:return 2;}
  body=malloc(size+1);for(int i=0;i<size;i++)body[i]='a'+(i*7)%26;
  lat=malloc(sizeof(unsigned)*(total*2+1000000));ep=epoll_create1(0);cs=calloc(conns,sizeof*cs);
  int flood=!strcmp(mode,"flood")||!strcmp(mode,"rflood"),churn=!strcmp(mode,"churn");
  if(consumers<0)consumers=conns/2;
  for(int i=0;i<conns;i++){conn_t*c=&cs[i];c->id=i;c->incap=1<<20;if((size_t)size*depth*2+65536>c->incap)c->incap=(size_t)size*depth*2+65536;c->in=malloc(c->incap);
    c->out=malloc((size_t)(size+256)*(depth+2)*2+65536);c->t0=calloc(depth+1,sizeof(double));
    if(flood)c->kind=i<consumers?(!strcmp(mode,"rflood")?RELIABLE:GET):PUT;else if(churn)c->kind=CHURN;else if(!strcmp(mode,"get"))c->kind=GET;else if(!strcmp(mode,"reliable"))c->kind=RELIABLE;else c->kind=PUT;
    if(opencon(c)<0)return 1;}
  target_put=(flood||churn||!strcmp(mode,"put"))?total:0;target_get=(flood||!strcmp(mode,"get")||!strcmp(mode,"reliable"))?total:0;
  double s=now();for(int i=0;i<conns;i++)pump(&cs[i]);
  struct epoll_event ev[256];long putdone=0;double lastp=s;
  while(putdone<target_put||got<target_get){
    int n=epoll_wait(ep,ev,256,10000);if(n<=0){fprintf(stderr,"stalled: put %ld got %ld\n",putdone,got);errors_++;break;}
    for(int i=0;i<n;i++){conn_t*c=ev[i].data.ptr;
      if(ev[i].events&EPOLLOUT){want(c,0);flushout(c);}
      if(ev[i].events&(EPOLLIN|EPOLLHUP|EPOLLERR)){
        ssize_t r=recv(c->fd,c->in+c->inlen,c->incap-c->inlen,0);
        if(r==0){fprintf(stderr,"closed by server\n");errors_++;epoll_ctl(ep,EPOLL_CTL_DEL,c->fd,0);close(c->fd);continue;}
        if(r<0){if(errno!=EAGAIN){perror("recv");errors_++;}continue;}
        c->inlen+=r;size_t off=0;double t=now();int k;
        while(off<c->inlen){size_t u=parse(c,c->in+off,c->inlen-off,&k);if(!u)break;off+=u;
          if(k==0)continue;
          unsigned us=(unsigned)((t-c->t0[c->th])*1e6);c->th=(c->th+1)%(depth+1);c->done++;lat[nlat++]=us;
          if(k==1)putdone++;else if(k==2){got++;finished++;}else if(k==3){misses++;finished++;}else{errors_++;if(errors_<4)fprintf(stderr,"error reply: %.60s\n",c->in+off-u);if(putside(c->kind)==0)putdone++;else finished++;}
          if(nlat>total*2+900000)nlat--;
        }
        memmove(c->in,c->in+off,c->inlen-off);c->inlen-=off;
        if(c->kind==CHURN&&c->done==c->sent){close(c->fd);if(issued[0]<target_put){if(opencon(c)<0)return 1;}else continue;}
        pump(c); if(c->outlen>c->outoff)flushout(c);
      }}
    if(now()-lastp>300){fprintf(stderr,"time bound\n");break;}
  }
  double d=now()-s;
  int cmp(const void*a,const void*b){unsigned x=*(unsigned*)a,y=*(unsigned*)b;return x<y?-1:x>y;}
  qsort(lat,nlat,sizeof(unsigned),cmp);
  long ops=putdone+got;
  printf("%-8s c=%d P=%d s=%d ops=%ld sec=%.3f ops/s=%.0f p50=%u p99=%u p99.9=%u max=%u err=%ld miss=%ld\n",mode,conns,depth,size,ops,d,ops/d,
    nlat?lat[nlat/2]:0,nlat?lat[(long)(nlat*.99)]:0,nlat?lat[(long)(nlat*.999)]:0,nlat?lat[nlat-1]:0,errors_,misses);
  return errors_?1:0;
}
