// A server of WebSockets that sends back what it gets, with words that make it do something else:
// `close CODE REASON` closes, `die` cuts the connection, `ping` pings and tells when the answer is
// there. GET /closed tells how the last connection ended; other paths what the request looked like.
import { createServer } from 'node:http'
import { WebSocketServer } from 'ws'

let closed = ''
let tell = []
const server = createServer((request, response) => {
  if (request.url === '/closed') {
    const answer = () => response.end(closed)
    if (closed) answer()
    else tell.push(answer)
    return
  }
  response.end(JSON.stringify(request.headers))
})
const sockets = new WebSocketServer({
  server,
  maxPayload: 64 << 20,
  perMessageDeflate: true,
  handleProtocols: (offered) => (offered.has('two') ? 'two' : false),
})
sockets.on('connection', (socket, request) => {
  closed = ''
  socket.on('message', (data, isBinary) => {
    const [word, ...rest] = isBinary ? [] : data.toString().split(' ')
    if (word === 'close') socket.close(Number(rest[0]), rest.slice(1).join(' '))
    else if (word === 'die') socket._socket.destroy()
    else if (word === 'ping') socket.ping('are you there', false)
    else if (word === 'headers') socket.send(JSON.stringify(request.headers))
    else socket.send(data, { binary: isBinary })
  })
  socket.on('pong', (data) => socket.send(`pong ${data}`))
  socket.on('close', (code, reason) => {
    closed = `${code} ${reason}`
    for (const answer of tell.splice(0)) answer()
  })
})
server.listen(3000)
